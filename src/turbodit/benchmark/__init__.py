"""What a model costs on a device: `turbodit bench step | ladder | attention | linear | e2e`.

Each command has a module that measures, and gives back plain values for JSON; what is computed
from measured numbers, and what is written of them, are functions of their own.
"""
