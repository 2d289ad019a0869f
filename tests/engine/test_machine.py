"""A CPU's memory: what is freed is kept for the next iteration."""

import os
import subprocess
import sys

import pytest

CODE = """
import resource
from mmdet_lors.engine.machine import use_device

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(b"1") * 200_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
use_device("cpu")
faults()
print(first, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
@pytest.mark.parametrize(("settings", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_a_large_block_is_used_again_without_page_faults_unless_the_user_has_chosen(settings, kept):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | settings)
    first, later = map(int, done.stdout.split())
    assert first > 1000 and (later < 100) is kept, done.stdout + done.stderr
