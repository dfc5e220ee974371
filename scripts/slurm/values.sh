# shellcheck shell=bash
# Checks of values before they are used: variables, presets, files, output of commands. Bash arithmetic evaluates what
# it is given, `a[$(command)0]` too, and takes 08 for an octal number. The caller has a function `die`.

readonly whole_number='^(0|[1-9][0-9]{0,8})$'
readonly host_name='[A-Za-z0-9][A-Za-z0-9._-]*'

# NAME VALUE [LEAST]
check_number() {
    local least=${3:-0}
    [[ $2 =~ $whole_number && $2 -ge $least ]] ||
        die "$(shown "$1" "$2"): must be a whole number from $least to 999999999, in base 10, without leading zeros"
}

# NAME VALUE PATTERN WHAT: the whole value has the pattern.
check_pattern() { [[ $2 =~ ^($3)$ ]] || die "$(shown "$1" "$2"): must be $4"; }

# NAME VALUE: on one line, no control characters.
check_text() { [[ $2 != *[[:cntrl:]]* ]] || die "$(shown "$1" "$2"): must be without control characters"; }

# NAME VALUE: a path that is a word of its own, also among mounts.
check_path() {
    check_text "$1" "$2"
    [[ $2 != -* ]] || die "$(shown "$1" "$2"): must not begin with -"
    [[ -z ${CONTAINER_IMAGE:-} || $2 != *[:,]* ]] || die "$(shown "$1" "$2"): must be without : and , with CONTAINER_IMAGE"
}

# NAME VALUE as a line can show them.
shown() { printf '%s=%.160s' "$1" "$([[ $2 =~ ^[[:alnum:]/._:=,@+-]*$ ]] && printf %s "$2" || printf %q "$2")"; }

# PREFIX KNOWN...: names variables of the environment with the prefix that neither are known nor read by the plugin.
name_unknown_variables() {
    local name prefix=$1
    shift
    for name in $(compgen -e | grep "^$prefix" || true); do
        [[ " $* " == *" $name "* ]] && continue
        grep -rqwF --include='*.py' --include='*.yaml' -- "$name" "$WALLFACER_ROOT/megatron_wallfacer" \
            "$WALLFACER_ROOT/configs" 2>/dev/null ||
            printf 'wallfacer: warning: %s is set, but nothing reads a variable of this name\n' "$name" >&2
    done
}
