"""Tests import from the repository root, offline, with few threads."""
import contextlib
import os
import resource
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes its background jobs ignore it

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A busy machine is no failure, and a failure comes again.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture
def limited_files():
    """A context in which the kernel refuses to write beyond so many bytes of a file, as a full disk does."""
    @contextlib.contextmanager
    def limited(most):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return limited
