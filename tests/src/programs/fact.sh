# fact NAME COMMAND...: a line with what a command printed, and with the signal that killed it.
fact() { printf '%s: ' "$1"; shift; { "$@" 2>&1 || killed $?; } | tr '\n' ' '; echo; }
killed() { [ "$1" -le 128 ] || [ "$1" -gt 192 ] || echo "killed by signal $(($1 - 128))"; }

