"""Where scripts import ``compiler_config`` from."""
