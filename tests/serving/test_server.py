"""The bounded server: what its event loop says of trouble."""

import errno

from voltana_ctrl.serving.server import _quiet_when_full


class Loop:
    """An event loop as far as the handler asks it."""

    def __init__(self):
        self.now_s, self.passed_on = 0.0, []

    def time(self):
        return self.now_s

    def default_exception_handler(self, context):
        self.passed_on.append(context)


def test_a_lack_of_descriptors_is_said_once_a_minute_and_the_rest_as_ever(caplog):
    loop, handle = Loop(), _quiet_when_full("router")
    full = {"exception": OSError(errno.EMFILE, "Too many open files")}
    for _ in range(2000):
        handle(loop, full)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "router: no file descriptor is left, so that connections wait"
    ]
    loop.now_s = 61.0
    handle(loop, full)
    assert len(caplog.records) == 2
    assert loop.passed_on == []
    other = {"exception": ValueError("other")}
    handle(loop, other)
    assert loop.passed_on == [other]
