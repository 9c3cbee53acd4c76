"""Weights that go anywhere: python -m snclr.export FILE --format FORMAT --out OUT

A format is a function from an encoder and its info to the model of the library that will read the file and the content to
write. The command loads the written file back into that model and compares the outputs on a random image.
"""

import os
import sys
from collections.abc import Callable

import timm
import torch
import torchvision
from torch import Tensor, nn

from .backbones import RESNETS, TIMM, VITS, VisionTransformer
from .options import new_parser
from .running import tensor_files
from .running.errors import RunError, UsageError, one_clear_line
from .weights.reading import open_encoder, read_encoder

TOLERANCE = 1e-5


def to_timm(encoder: nn.Module, info: dict) -> tuple[nn.Module, dict]:
    """timm's own model and its state dict."""
    arch = info["arch"]
    if arch.startswith(TIMM):
        settings = dict(info["timm_kwargs"] or [])
        sized = (
            {"img_size": info["img_size"]}
            if timm.get_pretrained_cfg(arch.removeprefix(TIMM)).fixed_input_size
            else {}
        )
        model = timm.create_model(arch.removeprefix(TIMM), num_classes=0, **{**sized, **settings})
    elif isinstance(encoder, VisionTransformer):
        width, depth, num_heads, embed_layer = VITS[arch]
        size = dict(
            img_size=info["img_size"],
            patch_size=info["patch_size"],
            embed_dim=width,
            depth=depth,
            num_heads=num_heads,
        )
        model = timm.models.VisionTransformer(**size, embed_layer=embed_layer, num_classes=0)
    else:
        model = timm.create_model(_plain_resnet(info, "timm"), num_classes=0)
    return model, encoder.state_dict()


def to_torchvision(encoder: nn.Module, info: dict) -> tuple[nn.Module, dict]:
    """torchvision's own ResNet, without its classifier, and its state dict."""
    model = getattr(torchvision.models, _plain_resnet(info, "torchvision"))()
    model.fc = nn.Identity()
    return model, encoder.state_dict()


def to_deit(encoder: nn.Module, info: dict) -> tuple[nn.Module, dict]:
    """DeiT's files: timm's names below 'model'."""
    if not isinstance(encoder, VisionTransformer):
        raise UsageError(f"--format deit is for ViTs, not for {info['arch']}")
    model, state = to_timm(encoder, info)
    return model, {"model": state}


def to_mocov3(encoder: nn.Module, info: dict) -> tuple[nn.Module, dict]:
    """MoCo v3's checkpoints: its names below 'state_dict', of the encoder that was read alone."""
    model, state = to_timm(encoder, info)
    state = {f"module.base_encoder.{name}": tensor for name, tensor in state.items()}
    return model, {"epoch": info["epoch"], "arch": info["arch"], "state_dict": state}


def to_hf(encoder: nn.Module, info: dict) -> tuple[nn.Module, dict]:
    """Hugging Face transformers' ViTModel and its state dict."""
    if not isinstance(encoder, VisionTransformer) or info["arch"].startswith("vit_conv"):
        raise UsageError(
            f"--format hf is for ViTs with a plain patch embedding, not for {info['arch']}"
        )
    try:
        from transformers import ViTConfig, ViTModel
    except ImportError as error:
        raise UsageError(
            "--format hf needs transformers: pip install -r requirements-hf.txt"
        ) from error
    width, depth, num_heads, _ = VITS[info["arch"]]
    shape = dict(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        intermediate_size=4 * width,
    )
    shape |= dict(image_size=info["img_size"], patch_size=info["patch_size"], layer_norm_eps=1e-6)
    model = ViTModel(ViTConfig(**shape), add_pooling_layer=False)
    state = {}
    for name, tensor in encoder.state_dict().items():
        for ours, theirs in HF_NAMES:
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = piece
        else:
            state[name] = tensor
    return model, state


HF_NAMES = (
    ("norm.", "layernorm."),  # the last one: those of the blocks have numbers
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
FORMATS = {
    "timm": to_timm,
    "torchvision": to_torchvision,
    "deit": to_deit,
    "hf": to_hf,
    "mocov3": to_mocov3,
}


def _plain_resnet(info, library):
    arch = info["arch"]
    plain = (
        arch in RESNETS
        and RESNETS[arch][3] == "imagenet"
        and info["width"] in (None, RESNETS[arch][2])
    )
    if not plain or info["small_stem"]:
        raise UsageError(
            f"{library} has no {arch} with the encoder's stem and width: its own have 7x7 stems and full width"
        )
    return arch


def write(format_name: str, content: dict, model: nn.Module, out: str) -> None:
    """Write the content as the format wants it: a folder for hf, else a file, safetensors where its name says so."""
    if format_name == "hf":
        os.makedirs(out, exist_ok=True)
        model.config.architectures = ["ViTModel"]
        model.config.save_pretrained(out)
        out = os.path.join(
            out, "model.safetensors"
        )  # in the names of the hub's files, which every version reads
    if out.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(
            {name: tensor.contiguous() for name, tensor in content.items()},
            out,
            metadata={"format": "pt"},
        )
    else:
        tensor_files.save(out, content)


def read_back(format_name: str, model: nn.Module, out: str) -> Callable[[Tensor], Tensor]:
    """The consumer's model with the weights of the written file, as a function from images to features."""
    if format_name == "hf":
        model = type(model).from_pretrained(out, add_pooling_layer=False).eval()
        return lambda x: model(x).last_hidden_state[:, 0]
    model.load_state_dict(read_encoder(out).tensors, strict=True)
    return model.eval()


@torch.no_grad()
def check(encoder: nn.Module, consumer: Callable[[Tensor], Tensor], img_size: int) -> float:
    """The largest difference of the features of a random image, over the largest feature. Raises RunError above TOLERANCE."""
    x = torch.randn(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    expected = encoder.embed(x)
    difference = ((consumer(x) - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise RunError(
            f"the exported weights give other features (relative difference {difference:.1e}): do not use them"
        )
    return difference


def main(argv: list[str]) -> None:
    parser = new_parser(
        "snclr.export",
        "Writes the encoder of a checkpoint for another library, and checks that it reads it.",
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint or state dict, any layout")
    parser.add_argument("--format", choices=FORMATS, required=True, help="who shall read it")
    out = "file to write (hf: folder); .safetensors for timm, torchvision"
    parser.add_argument("--out", required=True, metavar="OUT", help=out)
    parser.add_argument(
        "--encoder",
        choices=("online", "momentum"),
        default="online",
        help="where the file has both",
    )
    parser.add_argument("-a", "--arch", help="architecture, where the file does not say it")
    args = parser.parse_args(argv)
    if os.path.exists(args.out):
        raise UsageError(f"--out {args.out} exists: choose another name or remove it")
    if not os.access(os.path.dirname(os.path.abspath(args.out)), os.W_OK):
        raise UsageError(f"--out {args.out}: its folder does not exist, or may not be written to")
    if args.out.endswith(".safetensors") and args.format not in ("timm", "torchvision"):
        raise UsageError(
            f"--format {args.format} is more than safetensors can hold in one file: choose another --out"
        )
    encoder, info = open_encoder(args.file, args.encoder, arch=args.arch)
    model, content = FORMATS[args.format](encoder, info)
    folder, name = os.path.split(os.path.abspath(args.out))
    unchecked = os.path.join(folder, f"unchecked_{name}")
    write(args.format, content, model, unchecked)
    difference = check(encoder, read_back(args.format, model, unchecked), info["img_size"])
    os.replace(unchecked, args.out)
    for note in info["notes"]:
        print(f"note: {note}")
    print(f"{args.out}: {info['arch']} ({info['encoder']} encoder) for {args.format}")
    print(f"checked: loaded back, features of a random image agree to {difference:.1e} (relative)")


if __name__ == "__main__":
    with one_clear_line("snclr.export"):
        main(sys.argv[1:])
