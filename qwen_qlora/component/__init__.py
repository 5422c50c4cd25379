"""Small shared parts, under the walkthrough's names."""
