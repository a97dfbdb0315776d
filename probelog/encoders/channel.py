"""What an index's encoder and the process that it runs in (`probelog.encoders.process`) say to each other.

A request is the length of its header, the header as JSON, and as many bytes as the header's ``sizes`` name. An answer
is a status, a length, and as many bytes: what was asked for, or a message.
"""

from __future__ import annotations

import struct

HEADER = struct.Struct("<I")
ANSWER = struct.Struct("<BQ")
OK, DAMAGED = 0, 1
MESSAGE_BYTES = 2000
# First argument of a process that is to connect, and length of the key that its connections begin with.
CONNECT = "connect"
KEY_BYTES = 32
