"""Give a script an environment in which dbojax and its extras can be imported.

At the top of a script in this folder, before any import of a third party:

    from environment import ensure

    ensure(["tasks", "run"])

An interpreter that has dbojax from this checkout, in editable form, and what the extras
ask for is used as it is. Otherwise `.venv` in the checkout is made, or brought up to
date, with pip, and the script starts again inside it. From a shell,

    python3 benchmarks/environment.py dev

does the same and prints the interpreter to use. Standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "dbojax.json"  # what was installed, written when all of it was
RESTARTED = "DBOJAX_RESTARTED"  # guards against a loop of restarts
OLDEST = (3, 11)


def ensure(extras):
    """Return in a good environment, or start the script again in one."""
    restarted = os.environ.pop(RESTARTED, None)
    python = interpreter(extras)
    if python is None:
        return
    if restarted:
        _stop(
            f"{sys.executable} was set up for dbojax with {sorted(extras)} and still "
            f"cannot be used. Remove {VENV} and start again."
        )
    os.environ[RESTARTED] = "1"
    _replace_process([str(python), *sys.orig_argv[1:]])


def interpreter(extras):
    """The Python to start again with, once it is ready; None if this one is good."""
    if sys.version_info < OLDEST:
        _stop(
            f"dbojax needs Python {OLDEST[0]}.{OLDEST[1]} or later; this is "
            f"{sys.version.split()[0]} ({sys.executable}). Start the script with a "
            "later one, e.g. `python3.11`."
        )
    project = _read_project()
    extras = _closure(project, extras)
    if _is_good(project, extras):
        return None
    if _inside_venv() or not _is_up_to_date(extras):
        _install(project, extras)
    return _venv_python()


def _is_good(project, extras):
    # A `.venv` that was filled by hand has no stamp; one of ours must be fresh.
    stale = _inside_venv() and STAMP.exists() and not _is_up_to_date(extras)
    return not stale and _is_this_checkout() and not _missing(project, extras)


def _read_project():
    import tomllib  # from Python 3.11 on, hence not at the top

    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def _closure(project, extras):
    """The extras, and the extras of dbojax that they name themselves."""
    known, found, queue = project["optional-dependencies"], set(), list(extras)
    while queue:
        extra = queue.pop()
        if extra not in known:
            _stop(f"dbojax has no extra {extra!r}. Write some of {sorted(known)}.")
        if extra not in found:
            found.add(extra)
            for line in known[extra]:
                queue += re.findall(r"[\w-]+", _own_extras(line))
    return found


def _own_extras(line):
    match = re.match(r"dbojax\[(.*?)\]", line)
    return match.group(1) if match else ""


def _missing(project, extras):
    """Requirements that the running interpreter does not meet."""
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [line for line in lines if not _own_extras(line) and not _is_met(line)]


def _is_met(line):
    name, bounds = re.match(r"([\w.-]+)(?:\[.*?\])?(.*)", line).groups()
    try:
        found = _numbers(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False
    for relation, bound in re.findall(r"([<>=!~]=?)([\w.]+)", bounds):
        if relation == ">=" and found < _numbers(bound):
            return False
        if relation == "==" and found != _numbers(bound):
            return False
    return True


def _numbers(version):
    release = re.match(r"[\d.]*", version).group()
    return [int(part) for part in release.split(".") if part]


def _is_this_checkout():
    """Whether the running interpreter has dbojax from here, in editable form."""
    try:
        distribution = importlib.metadata.distribution("dbojax")
    except importlib.metadata.PackageNotFoundError:
        return False
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    folder = url2pathname(urlsplit(source.get("url", "")).path)
    editable = source.get("dir_info", {}).get("editable", False)
    return editable and Path(folder).resolve() == ROOT


def _inside_venv():
    return Path(sys.prefix).resolve() == VENV.resolve()


def _venv_python():
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _fingerprint():
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()


def _stamped():
    try:
        return json.loads(STAMP.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _is_up_to_date(extras):
    stamp = _stamped()
    return (
        _venv_python().exists()
        and stamp.get("root") == str(ROOT)
        and stamp.get("pyproject") == _fingerprint()
        and extras <= set(stamp.get("extras", []))
    )


def _install(project, extras):
    kept = set(_stamped().get("extras", [])) & set(project["optional-dependencies"])
    extras = sorted(extras | kept)
    wanted = f"{ROOT}[{','.join(extras)}]"
    _say(
        f"Setting up dbojax[{','.join(extras)}] in {VENV}: about 1 GB on disk and a "
        "few minutes, once."
    )
    STAMP.unlink(missing_ok=True)
    if not _venv_python().exists():
        _make_venv()
    pip = [str(_venv_python()), "-m", "pip", "install", "--quiet"]
    if subprocess.call([*pip, "--editable", wanted], stdout=sys.stderr):
        _stop(
            "pip could not install what is needed; its own words are above. If there "
            "is no network, prepare an environment by other means, "
            f'`pip install -e "{wanted}"`, and start the script with its Python. If '
            f"{VENV} is damaged, remove it and start again."
        )
    stamp = {"root": str(ROOT), "pyproject": _fingerprint(), "extras": extras}
    STAMP.write_text(json.dumps(stamp), "utf-8")


def _make_venv():
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        _stop(
            f"Could not make the virtual environment {VENV}:\n{made.stdout}"
            f"{made.stderr}\nOn Debian and Ubuntu, `apt install python3-venv` brings "
            "what is missing."
        )


def _replace_process(command):
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # os.execv would return to the shell at once there
        raise SystemExit(subprocess.call(command))
    os.execv(command[0], command)


def _say(text):
    print(text, file=sys.stderr, flush=True)


def _stop(text):
    raise SystemExit(text)


if __name__ == "__main__":
    print(interpreter(sys.argv[1:]) or sys.executable)
