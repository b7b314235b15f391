"""Copies that transformers makes of modelling files go to a folder of each worker process."""

import atexit
import os
import shutil
import tempfile

if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
