"""Tables of functions by the names that a config gives them."""

from utils import UserError


def register(table, *names):
    """Decorator: enter a function into `table` under these names."""

    def enter(function):
        table.update(dict.fromkeys(names, function))
        return function

    return enter


def look_up(table, name, key):
    """table[name]; UserError with the names there are. key: of the config, for the sentence."""
    if name not in table:
        raise UserError(f"{key} {name!r} is unknown: there is {', '.join(sorted(table))}")
    return table[name]
