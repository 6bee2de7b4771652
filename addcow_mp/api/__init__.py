"""The public functions of ``addcow_mp``, which imports them when they are first used."""
