from .servers import mooncake, open_tier, redis, s3  # noqa: F401
