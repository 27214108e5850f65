"""Tables of functions by the names that a config gives them."""

def register(table, *names):
    """Decorator: enter a function into `table` under these names."""

    def enter(function):
        table.update(dict.fromkeys(names, function))
        return function

    return enter
