"""Files of chats → examples (token ids and weights) → flat batches."""
