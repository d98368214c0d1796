"""Machine code at run time on the CPU: LLVM IR text -> object code -> a call on torch's threads."""
