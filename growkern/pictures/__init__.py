"""Pictures of plans, reports and schedules, from plain data. The rooms above import this room inside functions: it needs matplotlib."""

try:
    import matplotlib as matplotlib
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    raise ModuleNotFoundError(
        'matplotlib is missing: pip install "growkern[demo]"', name="matplotlib"
    ) from None
