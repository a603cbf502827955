"""Compiled programs on disk, so that the next start of a script finds them there."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from dbojax import trees


def keep_compiled(
    folder: str | os.PathLike | None = None, least_seconds: float = 0.1
) -> Path:
    """Keep compiled programs in a folder, for this process and later ones.

    JAX's own persistent cache, with its settings in one place: a program is found again
    by its code, the options, the versions and the device. What was compiled before the
    call is not kept. JAX trusts what lies in the folder and runs it, so it has to be
    yours. On some processors the compiler refuses its own entries and compiles anew.

    Args:
        folder: made if need be; None: ``dbojax`` in ``$XDG_CACHE_HOME``, else in
            ``~/.cache``.
        least_seconds: what took less to compile is not kept.

    Returns:
        The folder.

    Raises:
        ValueError: if the folder is a file, or (on POSIX) another user's, or others
            may write into it; if ``least_seconds`` is negative.

    Examples:
        >>> import tempfile
        >>> before = jax.config.jax_compilation_cache_dir
        >>> folder = keep_compiled(tempfile.mkdtemp())
        >>> jax.config.jax_compilation_cache_dir == str(folder)
        True
        >>> jax.config.update("jax_compilation_cache_dir", before)
    """
    if least_seconds != 0:
        trees.check_positive(least_seconds, "least_seconds")
    folder = _default() if folder is None else Path(folder).expanduser()
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`keep_compiled` needs a folder; {folder} is a file.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix":
        _check_own(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # else one that was in use stays in use
    return folder


def _check_own(folder: Path) -> None:
    """Refuse a folder into which another user may put programs."""
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise ValueError(
            f"{folder} belongs to another user, and JAX runs what it finds there. Name "
            "a folder of your own."
        )
    if found.st_mode & 0o022:
        raise ValueError(
            f"Others may write into {folder}, and JAX runs what it finds there. Write "
            f"`chmod go-w {folder}`, or name a folder of your own."
        )


def _default() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dbojax"
