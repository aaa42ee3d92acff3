#!/usr/bin/env bash
# Words that code, docs and error texts do without: persons (the subject is the code object, the condition the API's)
# and metaphors that need a second reading. The terms that are used stand in docs/dev/architecture.md.
set -euo pipefail
cd "$(dirname "$0")/.."

persons='somebody|someone|nobody|everybody|everyone|anybody|anyone|whoever|who|whom|she|he|his|her'
metaphors='rooms?(?! for)|companions?|listeners?|followers?|wish(es)?|stood in|foresee|soften|sight'
renamed='backward_keys|backward_queries|StandIn|Listener|Follower|Wishes|Wanted|Sight|STRANGE'

if git ls-files -- '*.py' '*.h' '*.cpp' '*.md' '*.sh' '*.yaml' Makefile .ci/run ':!CHANGELOG.md' ':!scripts/check_words.sh' |
    xargs grep -nwP "$persons|$metaphors|$renamed"; then
    echo "These words are not used here: the field's term, or the API's condition, in their place." >&2
    exit 1
fi
