"""Several simulated machines, if the system allows network namespaces."""

import subprocess

import nodes
import pytest

# as root, with iproute2; in a container root may lack the capability
TRY = "ip netns add snclr-$$ && ip netns exec snclr-$$ unshare --uts true; code=$?"
TRY += "; ip netns del snclr-$$; exit $code"
ALLOWED = subprocess.run(["sh", "-c", TRY], capture_output=True).returncode == 0


@pytest.mark.skipif(not ALLOWED, reason="network namespaces need root and iproute2")
def test_a_machine_that_cannot_be_reached_is_one_line_within_the_time_limit(images, tmp_path):
    with nodes.network(2):
        nodes.unreachable(2, images, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not ALLOWED, reason="network namespaces need root and iproute2")
def test_machines_agree_and_one_that_loses_power_comes_back(tmp_path):
    nodes.main(2, tmp_path)
