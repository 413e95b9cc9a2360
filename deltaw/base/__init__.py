"""Name or path → a frozen module and its tokenizer, ready for flat batches."""
