"""A training file as token ids on disk, written once and memory-mapped by every process.

    <hash>/tokens.bin      uint16 or uint32, one a token
           is_learnt.bin   uint8, one a token
           documents.bin   int64, where each document starts, and the end
           meta.json       counts; written last
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from functools import cached_property
from itertools import batched_documents
from pathlib import Path
from typing import Any
