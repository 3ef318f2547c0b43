"""The command line: what a user types, and the demo. Imports stages; nothing imports it."""
