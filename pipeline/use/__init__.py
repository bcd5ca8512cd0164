"""What is done with a finished run: looking things up in it, choosing from it, handing it on."""
