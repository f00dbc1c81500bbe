"""The public functions: `import loratools as lt`, and what each command of the line calls.

One module for each verb. A function takes a path or an `Adapter`, and options by the names that
the command line has; it returns a frozen result and writes nothing unless `output` is given.
"""
