from support.mixed import made  # noqa: F401  a fixture
