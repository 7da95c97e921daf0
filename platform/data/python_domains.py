"""Five domains of the standard library's source text: what a language stream brings one by one."""

import hashlib
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lamina.models.spec import DataSpec
from lamina.platform.data import tokens
from lamina.platform.data.dataset import ArraySource, Dataset
from lamina.platform.data.python_stdlib import library_files
from lamina.platform.errors import UserError

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "tables": ("encodings",),
    "network": ("email", "http", "urllib", "xmlrpc", "imaplib", "smtplib", "ftplib", "socket"),
    "concurrency": ("asyncio", "concurrent", "multiprocessing", "threading", "subprocess"),
    "testing": ("unittest", "doctest", "pdb", "trace", "timeit", "cProfile", "pstats", "bdb"),
    "numbers": ("_pydecimal", "statistics", "fractions", "random", "datetime", "_pydatetime"),
}
"""Domain to its packages and modules, in the order in which a stream brings them."""


def python_domains(*, context: int = 64, budget: int = 200_000, held_out: int = 20_000) -> Dataset:
    """Returns next-byte prediction over five domains of the running interpreter's library.

    Each domain has equally many bytes. Its files are joined in the order of a hash of their paths;
    the first `budget` bytes are trained on, and what follows is held out, for validation and then
    for test. Examples don't overlap. The text depends on the Python version.

    Args:
        context: bytes predicted per example.
        budget: training bytes of each domain, rounded down to whole examples.
        held_out: validation bytes of each domain, and as many test bytes.

    Raises:
        UserError: an example doesn't fit into the budget, or a domain has fewer bytes.
    """
    if context < 1 or min(budget, held_out) < context:
        raise UserError(
            f"data.budget = {budget} and data.held_out = {held_out} should each hold at least one "
            f"example of data.context = {context} bytes, at least 1"
        )
    root = Path(sysconfig.get_path("stdlib"))
    sizes = {"train": budget, "validation": held_out, "test": held_out}
    sizes = {split: size // context * context for split, size in sizes.items()}
    arrays = {split: {"inputs": [], "labels": [], "domains": []} for split in sizes}
    for number, (domain, text) in enumerate(_texts(root).items()):
        if len(text) <= sum(sizes.values()):
            raise UserError(
                f"domain {domain!r} of {root} has {len(text)} bytes, fewer than data.budget + 2 "
                f"data.held_out = {sum(sizes.values())}"
            )
        first = 0
        for split, size in sizes.items():
            window = text[first : first + size + 1].astype(np.int32)
            arrays[split]["inputs"].append(window[:-1].reshape(-1, context))
            arrays[split]["labels"].append(window[1:].reshape(-1, context))
            arrays[split]["domains"].append(np.full(size // context, number, np.int32))
            first += size
    joined = {
        split: ArraySource({name: np.concatenate(list_) for name, list_ in parts.items()})
        for split, parts in arrays.items()
    }
    return Dataset(
        spec=DataSpec((context,), "int32", tokens.BYTES),
        splits=joined,
        decode=tokens.decode_bytes,
        description=(
            f"Source text of the standard library of Python {sysconfig.get_python_version()} as "
            f"bytes, in the domains {', '.join(DOMAINS)}, {sizes['train']} training bytes each."
        ),
        bytes_per_token=dict.fromkeys(joined, 1.0),
    )


def _texts(root: Path) -> dict[str, np.ndarray]:
    """Returns the bytes of each domain."""
    members: dict[str, list[Path]] = {domain: [] for domain in DOMAINS}
    owner = {name: domain for domain, names in DOMAINS.items() for name in names}
    for file in library_files(root):
        domain = owner.get(file.relative_to(root).parts[0].removesuffix(".py"))
        if domain:
            members[domain].append(file)

    def place(file: Path) -> bytes:
        return hashlib.blake2b(file.relative_to(root).as_posix().encode(), digest_size=8).digest()

    return {
        domain: tokens.join(file.read_bytes() for file in sorted(files, key=place))
        for domain, files in members.items()
    }
