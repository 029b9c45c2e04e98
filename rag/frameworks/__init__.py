"""A corpus in the idiom of RAG frameworks, one file each; a framework is imported by its own file alone."""
