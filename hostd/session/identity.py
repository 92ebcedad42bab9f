# Owns: with which of this host's keys a dispatcher is spoken to: the one it has, and the one that is to replace it as
# soon as a dispatcher has accepted a session with that. Touches: the two key files (slash32.keys).
from __future__ import annotations

from pathlib import Path

from slash32.keys import KeyFileError, KeyPair, load_next, load_or_create_key, replace_key


class Identity:
    def __init__(self, file: Path) -> None:
        """Raises KeyFileError."""
        self._file = file
        self.present = load_or_create_key(file)
        self.trouble = ""  # why the next key is not used, if there is one and it is not

    def offered(self) -> list[KeyPair]:
        """In the order in which they are tried: a next key is made to be used."""
        try:
            following = load_next(self._file)
        except KeyFileError as error:
            self.trouble = str(error)
            return [self.present]
        self.trouble = ""
        return [self.present] if following in (None, self.present) else [following, self.present]

    def accepted(self, key: KeyPair) -> bool:
        """A dispatcher knows this host by `key`. True where that is news, and the old key's end."""
        if key == self.present:
            return False
        try:
            replace_key(self._file, key)
        except KeyFileError as error:
            self.trouble = str(error)  # the next session tries again: both keys are there
            return False
        self.present, self.trouble = key, ""
        return True
