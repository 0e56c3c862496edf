"""TODO"""


def plan(record, item):
    return 0
