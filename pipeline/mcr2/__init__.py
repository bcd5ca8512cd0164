"""The mathematics: tensors in, tensors out. Capitals are the papers' letters."""
