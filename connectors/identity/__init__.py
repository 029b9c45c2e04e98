"""What names the KV of a model, in every connector: weights, rope table, adapters, tenants. Imports no engine.

A chunk's key is made of a `KVSpec`, a salt, lead tokens and tokens. This package decides the first three:

    weights.py   `KVSpec.model_id`: the folder whose files compute the KV, or the tensors in memory
    rope.py      `KVSpec.rope`: one table for all engines that rotate alike
    requests.py  the salt: tenant, epoch, adapter, way of decoding; and the lead tokens
"""
