"""The keeper: the small process that is the parent of one private PostgreSQL server.

`embedded.py` runs this file with `python -I -S`, so it can import the standard library only, and is up at
once. It inherits two descriptors:

- the *seat* of the process that started it. Every user of the server holds such a connection and never
  writes to it. The kernel closes it at the user's death, whatever the death was; when the last one is gone
  the keeper stops the server and ends.
- the *lock*, already taken. PostgreSQL and all its children inherit it, so whoever gets that lock later
  knows that neither a keeper nor any server process of its is alive: no pid has to be believed.

Should the keeper itself be killed, Linux sends the server a SIGINT (a fast, clean shutdown).
"""

from __future__ import annotations

import ctypes
import os
import selectors
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

if sys.platform != "win32":  # where embedded.py imports this module, to say that it does not work there
    import pwd

CONTROL_SOCKET = "keeper.sock"
WELCOME = b"+"  # sent to a user that took a seat; a connection that ends without it came too late
SERVER_SOCKET = ".s.PGSQL.5432"

_FAST_STOP_SECONDS = 20.0  # a fast shutdown writes a checkpoint: 0.03 s when idle, seconds on a slow disk
_IMMEDIATE_STOP_SECONDS = 5.0

_HANDLED = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if sys.platform != "win32" else []))
_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Account:
    """As whom the server runs. PostgreSQL refuses to run as root, so that root has to become another.

    In a folder of somebody else's, that is the folder's owner. In root's own it is root still, in a user
    namespace where our uid is called `nobody`: there is nothing to create and no permission to change. Many
    containers refuse a namespace (EPERM); then the server really runs as `nobody`, in folders that are given
    to it and, where `nobody` cannot walk to them, handed over as open descriptors.
    """

    def __init__(self, home: Path) -> None:
        self.uid, self.gid = os.geteuid(), os.getegid()
        self.become: Callable[[], None] = lambda: None
        if self.uid != 0:
            return
        owner, nobody = home.stat(), pwd.getpwnam("nobody")
        if owner.st_uid != 0:
            self._switch_to(owner.st_uid, owner.st_gid)
            return
        # A name that exists, also inside: initdb looks itself up. Nothing but our own uid can be mapped.
        self.become = lambda: _enter_namespace(nobody.pw_uid, nobody.pw_gid)
        if not self.can(lambda: True):
            self._switch_to(nobody.pw_uid, nobody.pw_gid)

    def _switch_to(self, uid: int, gid: int) -> None:
        def switch() -> None:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)

        self.uid, self.gid, self.become = uid, gid, switch

    def can(self, deed: Callable[[], bool]) -> bool:
        """Say whether `deed` succeeds for a child process that has become this account."""
        child = os.fork()
        if child == 0:
            try:
                self.become()
                os._exit(0 if deed() else 1)
            except BaseException:  # noqa: BLE001 - whatever it is, the parent gets a plain no
                os._exit(1)
        return os.waitpid(child, 0)[1] == 0

    def own(self, folder: Path) -> None:
        """Give everything in `folder`, one of the library's own, to the account."""
        if os.geteuid() != 0 or folder.stat().st_uid == self.uid:
            return
        for parent, _, files in os.walk(folder):
            for path in (parent, *(os.path.join(parent, name) for name in files)):
                os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def path_to(self, folder: Path) -> str:
        """Return a path by which the account reaches `folder`, which it owns, whatever lies above it."""
        if self.can(lambda: os.access(folder, os.W_OK | os.X_OK)) or not os.path.isdir("/proc/self/fd"):
            return str(folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.set_inheritable(descriptor, True)
        return f"/proc/self/fd/{descriptor}"

    def spawn(self, argv: Sequence[str], death_signal: signal.Signals) -> int:
        """Start a program that gets `death_signal` when the keeper dies. Returns its pid."""
        keeper = os.getpid()
        # A signal that comes before the new program is there must end the child, not go to our handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        child = os.fork()
        if child:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
            return child
        try:
            for number in (*_HANDLED, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
            self.become()
            if sys.platform == "linux":  # after become(): a change of credentials clears it
                _libc("prctl", _PR_SET_PDEATHSIG, int(death_signal))
            if os.getppid() == keeper:
                clean = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))}
                os.execve(argv[0], list(argv), {**clean, "LC_ALL": "C"})
        except BaseException:  # noqa: BLE001 - a forked child must not run on in its parent's code
            traceback.print_exc()
        os._exit(127)


class Server:
    """One PostgreSQL server: its folders, its programs, its process."""

    def __init__(self, home: Path, run: Path, bin_dir: Path) -> None:
        self.data, self.run = home / "data", run
        self.account = Account(home)
        self.copy: Path | None = None
        self.bin_dir = self._executable(home, bin_dir)
        self.pid = 0

    def _executable(self, home: Path, bin_dir: Path) -> Path:
        """Return `bin_dir`, or a copy of the whole installation if the account cannot execute it."""
        if self.account.can(lambda: os.access(bin_dir / "postgres", os.X_OK)):
            return bin_dir
        # Not in our folder, to which the account may not be able to walk. 31 MB, 0.2 s. Programs of a wheel
        # find their libraries by relative path in the package's sibling `<package>.libs`.
        package, folder = bin_dir.parent.parent, home.stat()
        self.copy = Path(f"/tmp/commandbus-bin-{folder.st_dev}-{folder.st_ino}")  # noqa: S108 - made anew
        shutil.rmtree(self.copy, ignore_errors=True)
        self.copy.mkdir(mode=0o700)
        for source in (bin_dir.parent, *package.parent.glob(f"{package.name}.libs")):
            shutil.copytree(source, self.copy / source.relative_to(package.parent), symlinks=True)
        self.account.own(self.copy)
        return self.copy / bin_dir.relative_to(package.parent)

    def prepare(self) -> None:
        """Make the data folder, or clear what a server that died has left in it."""
        self.account.own(self.run)
        if self.data.is_dir():
            self.account.own(self.data)
            self._clear_data()
        else:
            self._make_data()
        for name in (CONTROL_SOCKET, SERVER_SOCKET, f"{SERVER_SOCKET}.lock"):
            (self.run / name).unlink(missing_ok=True)

    def _make_data(self) -> None:
        new = self.data.with_name("data.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        self.account.own(new)
        argv = [str(self.bin_dir / "initdb"), "-D", self.account.path_to(new), "-U", "postgres"]
        argv += ["--auth=trust", "--encoding=UTF8", "--no-locale", "--data-checksums", "--no-instructions"]
        initdb = self.account.spawn(argv, signal.SIGKILL)
        if os.waitpid(initdb, 0)[1] != 0:
            sys.exit("initdb failed")
        new.rename(self.data)
        home = os.open(self.data.parent, os.O_RDONLY)
        os.fsync(home)  # initdb has written all but this name through to the disk
        os.close(home)

    def _clear_data(self) -> None:
        """Remove the pid file of a dead server: PostgreSQL itself is misled by zombies and reused pids.

        Our lock says that no server of ours lives. A server that somebody started by hand would not hold it,
        so look for one; where there is no /proc, leave the pid file to PostgreSQL.
        """
        if os.path.isdir("/proc/self"):
            if strangers := [str(pid) for pid in _processes() if self._lives_here(pid)]:
                sys.exit(f"a server that was not started by commandbus uses {self.data}: {' '.join(strangers)}")
            (self.data / "postmaster.pid").unlink(missing_ok=True)

    def _lives_here(self, pid: int) -> bool:
        try:
            comm = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace")
            return comm.startswith("postgres") and os.path.samefile(f"/proc/{pid}/cwd", self.data)
        except OSError:  # gone, a zombie, or somebody else's
            return False

    def start(self, settings: Sequence[str]) -> None:
        """Start the server; it is ready later, which its users find out by connecting."""
        own = ["listen_addresses=", f"unix_socket_directories={self.account.path_to(self.run)}", "port=5432"]
        own += ["unix_socket_permissions=0700", "max_connections=200"]
        options = [word for setting in (*own, *settings) for word in ("-c", setting)]
        argv = [str(self.bin_dir / "postgres"), "-D", self.account.path_to(self.data), *options]
        self.pid = self.account.spawn(argv, signal.SIGINT)

    def reap(self) -> None:
        """Collect children that have ended; `pid` becomes 0 when the server is among them."""
        try:
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                if pid == self.pid:
                    self.pid = 0
        except ChildProcessError:
            self.pid = 0

    def stop(self) -> None:
        """Stop the server and leave no process of it: fast, then immediate, then by force."""
        for number, patience in (
            (signal.SIGINT, _FAST_STOP_SECONDS),
            (signal.SIGQUIT, _IMMEDIATE_STOP_SECONDS),
            (signal.SIGKILL, _IMMEDIATE_STOP_SECONDS),
        ):
            deadline = time.monotonic() + patience
            if self.pid:
                os.kill(self.pid, number)
            while self.pid and time.monotonic() < deadline:
                time.sleep(0.005)
                self.reap()
        # Children of a server that was killed come to us (we are their subreaper). One that is busy would not
        # notice its parent's death before its query ends.
        deadline = time.monotonic() + _IMMEDIATE_STOP_SECONDS
        while (orphans := _children()) and time.monotonic() < deadline:
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
            self.reap()

    def remove_traces(self) -> None:
        """Remove what is no longer of use, above all what lies outside of our folder."""
        (self.run / CONTROL_SOCKET).unlink(missing_ok=True)
        for folder in (self.copy, self.run.parent if self.run.parent != self.data.parent else None):
            if folder:
                shutil.rmtree(folder, ignore_errors=True)


def _enter_namespace(uid: int, gid: int) -> None:
    """Go on in a new user namespace, in which our user is called `uid`, and can no longer become root."""
    egid = os.getegid()
    _libc("unshare", _CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{uid} 0 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{gid} {egid} 1", encoding="ascii")


def _libc(function: str, *arguments: int) -> None:
    """Call a function of the C library (`os.unshare` came with Python 3.12, `prctl` never did)."""
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{function} failed")


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir("/proc/self") else []


def _children() -> list[int]:
    """Return the pids of this process's children (without /proc: none)."""
    children = []
    for pid in _processes():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
            children.append(pid)
    return children


def _serve(server: Server, listener: socket.socket, first: socket.socket) -> list[socket.socket]:
    """Give seats to users until the last has left, the server is dead, or we are told to stop.

    Returns the connections of the last users: they stay open until the server has stopped, so that a user
    who waits for their end knows that it has.
    """
    told: list[int] = []
    signals, wakeup = socket.socketpair()
    wakeup.settimeout(0)
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in _HANDLED:
        signal.signal(number, lambda number, _: told.append(number))
    users = {first}
    left: list[socket.socket] = []
    ready = selectors.DefaultSelector()
    for source in (signals, listener, first):
        ready.register(source, selectors.EVENT_READ, source)
    server.reap()  # it may have died before the handler of SIGCHLD stood
    while users and server.pid and not told:
        for key, _ in ready.select():
            sock: socket.socket = key.data
            if sock is signals:
                sock.recv(4096)
                server.reap()
            elif sock is not listener:  # a user says nothing, ever: this is its end
                ready.unregister(sock)
                users.discard(sock)
                left.append(sock)
        while (user := _accept(listener)) is not None:  # also the one who comes as the last one leaves
            users.add(user)
            ready.register(user, selectors.EVENT_READ, user)
        if users:
            while left:
                left.pop().close()
    signal.set_wakeup_fd(-1)
    return [*left, *users]


def _accept(listener: socket.socket) -> socket.socket | None:
    try:
        user = listener.accept()[0]
        user.sendall(WELCOME)
    except OSError:
        return None
    return user


def main(argv: Sequence[str]) -> None:
    """Keep one server: `_keeper.py SEAT LOCK HOME RUN BIN_DIR [NAME=VALUE ...]`."""
    if os.fork():
        os._exit(0)  # the user process has nobody to wait for, and sees no child that it did not start
    os.setsid()  # out of reach of the terminal's Ctrl-C
    os.chdir("/")
    os.umask(0o077)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a mask and an ignored signal would be inherited
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sys.platform == "linux":
        _libc("prctl", _PR_SET_CHILD_SUBREAPER, 1)
    first, lock = socket.socket(fileno=int(argv[1])), int(argv[2])
    first.set_inheritable(False)
    os.set_inheritable(lock, True)
    home, run, bin_dir = map(Path, argv[3:6])
    server = Server(home, run, bin_dir)
    try:
        server.prepare()
        listener = socket.socket(socket.AF_UNIX)
        listener.settimeout(0)
        listener.bind(str(run / CONTROL_SOCKET))
        listener.listen(128)
        server.start(argv[6:])
        waiting = _serve(server, listener, first)  # noqa: F841 - held open until the very end
        listener.close()
    finally:
        server.stop()
        server.remove_traces()
    os.close(lock)
    os._exit(0)  # the kernel hangs up on those who wait when nothing else of this process is left


if __name__ == "__main__":
    try:
        main(sys.argv)
    except BaseException as error:  # noqa: BLE001 - said before the seat closes: then the log is read
        said = str(error) if isinstance(error, SystemExit) else traceback.format_exc()
        print(said, file=sys.stderr, flush=True)  # noqa: T201 - its stderr is the log
        os._exit(1)
