"""Simulate several machines on one: each node is a network namespace with a name and an address.

    python tests/faults/nodes.py --nodes 3      as root, minutes on two cores

Every node calls start.sh as on a real machine. Three rehearsals:

agreement    all ranks end with the same weights and bank, equal to those of a run on one machine
unreachable  a wrong address, and a node that never joins, are an error within the time limit
power cut    a node loses its network and is killed; the others report it and wait; the node comes
             back, and the run ends as an undisturbed one
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import attack
from test_ranks import write_images

NET = "10.213.77"
NODE, BRIDGE = f"snclr{os.getpid()}n", f"snclr{os.getpid()}b"  # unique, for several at once


def sh(command):
    subprocess.run(command.split(), check=True, capture_output=True)


@contextlib.contextmanager
def network(count):
    """`count` namespaces named node0, node1, ... that can reach only each other."""
    hosts = "127.0.0.1 localhost\n" + "".join(
        f"{NET}.{number + 1} node{number}\n" for number in range(count)
    )
    with contextlib.ExitStack() as cleaning:
        sh(f"ip link add {BRIDGE} type bridge")
        cleaning.callback(sh, f"ip link del {BRIDGE}")
        sh(f"ip link set {BRIDGE} up")
        for number in range(count):
            name, folder = f"{NODE}{number}", Path(f"/etc/netns/{NODE}{number}")
            sh(f"ip netns add {name}")
            cleaning.callback(sh, f"ip netns del {name}")
            folder.mkdir(parents=True)
            cleaning.callback(sh, f"rm -r {folder}")
            (folder / "hosts").write_text(hosts)  # ip netns exec mounts it on /etc/hosts
            sh(f"ip link add {name} type veth peer name eth0 netns {name}")
            sh(f"ip link set {name} master {BRIDGE} up")
            for command in (
                "link set lo up",
                "link set eth0 up",
                f"addr add {NET}.{number + 1}/24 dev eth0",
            ):
                sh(f"ip -n {name} {command}")
        yield


def start(number, count, *flags, ranks=1, **environment):
    """start.sh on node `number` of `count`."""
    before = [
        "ip",
        "netns",
        "exec",
        f"{NODE}{number}",
        "unshare",
        "--uts",
        "bash",
        "-c",
        f'hostname node{number}; exec "$@"',
        "-",
    ]
    settings = {
        "NNODES": str(count),
        "NODE_RANK": str(number),
        "MASTER_ADDR": "node0",
        "JOIN_SECONDS": "120",
    }
    return attack.start(*flags, ranks=ranks, before=before, **{**settings, **environment})


def expect(condition, output):
    if not condition:
        raise SystemExit(f"not as expected:\n{output}")


def agreement(count, images, folder, undisturbed):
    """All nodes end with equal weights and bank, those of a run on one machine."""
    nodes = [
        start(number, count, images, *attack.FLAGS, "--workdir", folder / "agreement")
        for number in reversed(range(count))
    ]
    ends = [attack.ended(node, 300) for node in nodes][::-1]
    expect(all(code == 0 for code, _ in ends), ends)
    expect(
        "weights and bank of the ranks: the same, " in ends[0][1]
        and not any("step 1/" in text for _, text in ends[1:]),
        ends,
    )
    if count == 2:
        expect(attack.differences(undisturbed, folder / "agreement") == [], ends)


def unreachable(count, images, folder):
    """A wrong address, and a node that never joins: one line of error within the time limit."""
    for number, address in ((1, f"{NET}.99"), (0, "node0")):
        begun = time.monotonic()
        flags = [images, *attack.FLAGS, "--workdir", folder / "unreachable"]
        code, output = attack.ended(
            start(number, count, *flags, MASTER_ADDR=address, JOIN_SECONDS="5")
        )
        lines = [line for line in output.splitlines() if line.startswith("start.sh: error: ")]
        expect(code == 1 and len(lines) == 1 and "Traceback" not in output, output)
        print(f"  node {number}: {time.monotonic() - begun:.0f} s: {lines[0]}", flush=True)


def power_cut(count, images, folder, undisturbed):
    """The last node loses its network and dies; the others time out and wait until it is back."""
    last = count - 1
    flags = [
        images,
        *attack.FLAGS,
        "--workdir",
        folder / "cut",
        "--timeout-minutes",
        "0.2",
        "--resume",
        "auto",
    ]
    nodes = [start(number, count, *flags, MAX_RESTARTS="1") for number in range(count)]
    attack.wait_for_step(folder / "cut", 2, nodes[0])
    sh(f"ip link set {NODE}{last} down")
    pids = subprocess.run(
        ["ip", "netns", "pids", f"{NODE}{last}"], capture_output=True, text=True, check=True
    ).stdout.split()
    sh(f"kill -9 {' '.join(pids)}")
    nodes[last].wait()
    begun = time.monotonic()
    time.sleep(20)
    sh(f"ip link set {NODE}{last} up")
    nodes[last] = start(last, count, *flags)
    ends = [attack.ended(node, 300) for node in nodes]
    expect(all(code == 0 for code, _ in ends), ends)
    lost = [line for line in ends[0][1].splitlines() if "lost contact" in line]
    expect(
        f"lost contact with rank {last} on node{last}" in " ".join(lost)
        and "starting again, 1 of 1" in ends[0][1],
        ends,
    )
    print(
        f"  node 0: {lost[0]}\n  came back and done {time.monotonic() - begun:.0f} s after the cut",
        flush=True,
    )
    if count == 2:
        expect(attack.differences(undisturbed, folder / "cut") == [], ends)


def main(count, folder):
    images = write_images(folder / "images")
    flags = [images, *attack.FLAGS, "--workdir", folder / "undisturbed"]
    code, output = attack.ended(attack.start(*flags))
    expect(code == 0, output)
    with network(count):
        for name, rehearsal in (
            ("agreement", agreement),
            ("unreachable", unreachable),
            ("power cut", power_cut),
        ):
            print(f"{name}: {rehearsal.__doc__}", flush=True)
            rehearsal(
                count,
                images,
                folder,
                *([folder / "undisturbed"] if rehearsal is not unreachable else []),
            )
    print(f"{count} nodes: all as expected")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nodes", type=int, default=2, choices=(2, 4), help="whose number divides the batch of 8"
    )
    with tempfile.TemporaryDirectory() as temporary:
        main(parser.parse_args().nodes, Path(temporary))
