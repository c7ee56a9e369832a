"""Other libraries' names and argument orders for the ops of this one: translation, no logic."""
