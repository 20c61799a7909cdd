#!/bin/sh
# The rules of the house: see tests/house.py, which needs Python 3.
#   sh tests/test_house.sh     from the top folder
if command -v python3 > /dev/null 2>&1; then
  python3 tests/house.py
else
  echo "skipped house: python3 is not installed"
  echo "0 passed, 0 failed"
fi
