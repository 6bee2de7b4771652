"""What holds for every test: how the processes that they start meet signals."""

from __future__ import annotations

import signal

# Whoever starts the suite in the background, or under nohup, has it ignore these, and whatever
# it starts inherits that: what the tests say of signals would be of that shell.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        ending = signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        signal.signal(_number, ending)
