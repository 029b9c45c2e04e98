from .servers import redis  # noqa: F401
