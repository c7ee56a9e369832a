"""Other libraries' names and argument orders for this library's ops: translation, no logic."""
