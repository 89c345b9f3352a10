"""What is shipped, and the proof that the runtime it is for runs it."""
