"""The command line. Options in, human text or JSON out; decides nothing."""
