# SPDX-License-Identifier: Apache-2.0
"""The file names that a cache image may have, so that every file system accepts them unchanged."""

import re
import unicodedata
from pathlib import PurePosixPath

_NAME_LIMIT_BYTES = 255
_PATH_LIMIT_BYTES = 2048  # below the directory that it goes to
_DEPTH_LIMIT = 64

# What logins, shells, cron, systemd, Python and tools run or trust wherever they find it. No cache has such
# names, so nothing is lost, and a signer of kernels gets nothing else.
_SHELL = "bash_[a-z]+|profile|zshenv|zprofile|zlog(in|out)|log(in|out)"
_TOOLS = (
    "git|gitconfig|hg|vim|emacs([.]d)?|gdbinit|lldbinit|config|local|direnv|tmux[.]conf|ipython|jupyter|cargo"
    "|rustup|m2|gradle|mailcap|rprofile|renviron|julia"
)
_KEYS = (
    "ssh|[rs]hosts|gnupg|aws|azure|boto|kube|docker|forward|pgpass|k5(login|users)|my(login)?[.]cnf"
    "|vault-token"
)
_SESSION = "xsession|xprofile|xresources|xdefaults|xauthority|pam_environment|environment"
_UNIT = "service|socket|timer|mount|automount|path"
_RUN_ELSEWHERE = re.compile(
    rf"\.({_SHELL}|{_TOOLS}|{_KEYS}|{_SESSION}|[a-z0-9_-]*rc)"  # .bashrc, .npmrc, .curlrc, .psqlrc, …
    r"|authorized_keys2?|crontab|cron\.[a-z]+|anacrontab|sudoers|doas\.conf|ld\.so\.(preload|conf)|rc\.local"
    r"|(sudoers|ld\.so\.conf|pam|init|profile|rc[0-6s]?|modprobe|modules-load|sysctl|tmpfiles)\.d"
    rf"|.+\.({_UNIT})(\.d)?|.+\.(wants|requires)|.+\.desktop"
    r"|(site|user)customize\.py|.+\.pth"
)


class Names:
    """The paths of one cache, relative to its root."""

    def __init__(self) -> None:
        self._folded: set[str] = set()

    def problem(self, path: PurePosixPath) -> str:
        """Return the reason to reject `path`, or "" and remember it."""
        try:
            encoded = str(path).encode()
        except UnicodeEncodeError:
            return "has a name that is not UTF-8"
        if not path.parts or path.is_absolute() or ".." in path.parts:
            return "leads out of the cache"
        if len(encoded) > _PATH_LIMIT_BYTES or len(path.parts) > _DEPTH_LIMIT:
            return "has a name that is too long"
        for part in path.parts:
            if len(part.encode()) > _NAME_LIMIT_BYTES:
                return "has a name that is too long"
            if part.startswith(".wh."):
                return "has the name of a whiteout, which would remove files"
            if _RUN_ELSEWHERE.fullmatch(part.casefold()):
                return "has a name by which logins, cron, systemd or tools run or trust a file"
        if not str(path).isprintable():
            return "has a name that cannot be printed"
        # As file systems that ignore case compare names: on macOS, or ext4 with casefold.
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", str(path)).casefold())
        if folded in self._folded:
            return "has the name of another file, but for case or Unicode composition"
        self._folded.add(folded)
        return ""
