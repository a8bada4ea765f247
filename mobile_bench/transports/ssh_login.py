"""Getting into a device by SSH: the user's own configuration, keys and known hosts, and what to do when it fails."""

from __future__ import annotations

import getpass
import logging
import re
import shlex
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from mobile_bench.errors import InputError, TransportError
from mobile_bench.records import Connection

if TYPE_CHECKING:
    import paramiko

CONNECT_S, ANSWER_S, KEEPALIVE_S = 15, 60, 15
_KNOWN_HOSTS = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")
_HOST, _USER = re.compile(r"[\w.:%][\w.:%-]*"), re.compile(r"[\w.][\w.@\\+-]*")

# Its warnings would go to standard error; what matters becomes a TransportError.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


class Login:
    """Who logs in where. The user's ~/.ssh/config is heard for name, port, user, key and proxy command.

    name is for people; place names the device, the same for every way of writing its address.
    """

    def __init__(self, connection: Connection):
        user, _, alias = connection.address.rpartition("@")
        settings = _user_settings(alias)
        self._host = settings.get("hostname", alias)
        self._port = connection.port or int(settings.get("port", 22))
        self._user = user or settings.get("user") or getpass.getuser()
        if not _HOST.fullmatch(self._host) or not _USER.fullmatch(self._user):
            raise InputError(
                "A target's address cannot be used", received=repr(connection.address), allowed="user@host, in plain "
                "characters",
            )  # fmt: skip
        self._identity_file, self._own_known_hosts = connection.identity_file, connection.known_hosts
        self._identities = [connection.identity_file] if connection.identity_file else settings.get("identityfile", [])
        self._proxy = settings.get("proxycommand")
        self.place = f"ssh-{self._user}@{self._host}:{self._port}"
        self.name = f"{self._user}@{self._host}, port {self._port}"

    def connect(self) -> paramiko.SSHClient:
        """A client that is logged in; TransportError where that fails."""
        import paramiko

        client = paramiko.SSHClient()
        try:
            self._log_in(client)
        except BaseException:
            client.close()
            raise
        return client

    def _log_in(self, client: paramiko.SSHClient) -> None:
        import paramiko
        from paramiko.hostkeys import InvalidHostKey

        client.set_missing_host_key_policy(_Refuse(self))
        for file in (self._own_known_hosts,) if self._own_known_hosts else _KNOWN_HOSTS:
            path = Path(file).expanduser()
            try:
                if path.is_file():
                    client.load_system_host_keys(str(path))
            except (OSError, ValueError, InvalidHostKey) as error:
                raise TransportError("The known hosts cannot be read", received=f"{path} ({error})") from error
        identities = [str(Path(file).expanduser()) for file in self._identities]
        if self._identity_file and not Path(identities[0]).is_file():
            raise TransportError("There is no such key file", received=identities[0])
        if self._identity_file and b"PRIVATE KEY-----" not in Path(identities[0]).read_bytes()[:65_536]:
            raise TransportError(
                "The key file holds no private key", received=identities[0],
                allowed="a private key of OpenSSH or in PEM, as ssh-keygen writes it",
                next_step="Name the file without .pub; PuTTY's becomes one by: puttygen KEY.ppk -O private-openssh",
            )  # fmt: skip
        proxy = None
        try:
            proxy = paramiko.ProxyCommand(self._proxy) if self._proxy else None
            client.connect(
                self._host, self._port, self._user, key_filename=[f for f in identities if Path(f).is_file()] or None,
                look_for_keys=not self._identity_file, timeout=CONNECT_S, banner_timeout=CONNECT_S,
                auth_timeout=CONNECT_S, channel_timeout=ANSWER_S, sock=proxy,
            )  # fmt: skip
        except paramiko.BadHostKeyException as error:
            forget = ("ssh-keygen", "-R", self._host if self._port == 22 else f"[{self._host}]:{self._port}")
            forget += ("-f", self._own_known_hosts) if self._own_known_hosts else ()
            raise TransportError(
                f"The host key of {self.name} has changed: either the device was set up anew, or another machine "
                "answers in its place",
                received=_fingerprint(error.key), allowed=_fingerprint(error.expected_key),
                next_step=f"If it was set up anew: {shlex.join(forget)}, then {self.command()}",
            ) from error  # fmt: skip
        except (*failures(), ValueError) as error:
            if isinstance(error, paramiko.AuthenticationException) or "authentication methods" in str(error):
                copy_id = shlex.join(("ssh-copy-id", "-p", str(self._port), f"{self._user}@{self._host}"))
                raise TransportError(
                    f"{self.name} does not let us in", received=error,
                    next_step="Name the right key (identity_file), load one with a passphrase into ssh-agent, or put "
                    f"yours there: {copy_id}",
                ) from error  # fmt: skip
            raise TransportError(
                f"{self.name} cannot be reached",
                received=str(error).removeprefix("[Errno None] ") or type(error).__name__,
                next_step=f"Check that it is on and that its SSH server answers: {self.command()}",
            ) from error  # fmt: skip
        transport = client.get_transport()
        transport.set_keepalive(KEEPALIVE_S)
        if proxy is None and hasattr(socket, "TCP_USER_TIMEOUT"):
            # Keepalives alone expect no answer: this is what notices that a device is gone.
            transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * ANSWER_S)

    def command(self) -> str:
        """What a person types to log in."""
        own = self._own_known_hosts
        options = ("-i", str(Path(self._identity_file).expanduser())) if self._identity_file else ()
        options += ("-o", f"UserKnownHostsFile={Path(own).expanduser()}") if own else ()
        return shlex.join(("ssh", "-p", str(self._port), *options, f"{self._user}@{self._host}"))

    def refuse_unknown(self, key: paramiko.PKey) -> None:
        raise TransportError(
            f"The host key of {self.name} is not known",
            received=_fingerprint(key), allowed=f"a key in {self._own_known_hosts or _KNOWN_HOSTS[0]}",
            next_step=f"Log in once and compare the fingerprint: {self.command()}",
        )  # fmt: skip


class _Refuse:
    """What paramiko asks about a host that it does not know."""

    def __init__(self, login: Login):
        self._login = login

    def missing_host_key(self, client, hostname, key):
        self._login.refuse_unknown(key)


def failures() -> tuple[type[Exception], ...]:
    """What paramiko raises when a connection does not come about or fails. It loads only where it is used."""
    import paramiko

    return OSError, EOFError, paramiko.SSHException


def _user_settings(alias: str) -> dict:
    import paramiko

    path = Path("~/.ssh/config").expanduser()
    try:
        return paramiko.SSHConfig.from_path(str(path)).lookup(alias) if path.is_file() else {}
    except (*failures(), ValueError) as error:
        raise InputError("The SSH configuration cannot be read", received=f"{path} ({error})") from error


def _fingerprint(key: paramiko.PKey) -> str:
    return f"{key.get_name()} {key.fingerprint}"
