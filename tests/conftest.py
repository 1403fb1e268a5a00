"""Tests import from the repository root, offline, with few threads."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hypothesis import settings  # noqa: E402

# A busy machine is no failure, and a failure comes again.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
