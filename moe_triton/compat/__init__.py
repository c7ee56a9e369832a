"""Other libraries' names, argument orders and layouts for this library's ops."""
