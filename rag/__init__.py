"""Questions over a user's own documents: `Corpus` keeps texts, finds passages, and answers over their cached KV."""
