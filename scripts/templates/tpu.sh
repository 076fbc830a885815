#!/bin/bash
# @name: @slices slice(s) of @topology. Run it from the root of the checkout, on
# a machine that stays up. It creates the slices, again after each preemption,
# follows the training and deletes them at its end. Without it the training goes
# on: run it again to follow. To give up: Ctrl-C, then
#   gcloud compute tpus queued-resources delete @name --zone=@zone --force
set -u
qr() {
  local verb=$1
  shift
  gcloud compute tpus queued-resources "$verb" @name --zone=@zone "$@@"
}
# On every machine: install once, start or follow, and report the exit code.
read -r -d '' job <<'JOB'
install() {
  mkdir -p imagen_jax && tar -xzf imagen_jax.tgz -C imagen_jax &&
    cd imagen_jax && python3 -m pip install -q uv &&
    python3 -m uv venv -q --clear --python 3.12 .venv &&
    python3 -m uv pip install -q -c requirements.lock -e '.[tpu,gcs]' &&
    touch installed
}
[ -e imagen_jax/installed ] || (install) || (install) ||
  { echo 'ended 1'; exit; }
cd imagen_jax && . .venv/bin/activate
imagen-supervise --detach job.log --max_restarts @max_restarts -- \
    @train
echo "ended $?"
JOB

work=$(mktemp -d)
tar -czf "$work/imagen_jax.tgz" --exclude=./.git --exclude=./.venv --exclude=./runs .
created=
while :; do
  state=$(qr describe --format='value(state.state)' 2>"$work/error") ||
    state=$(grep -o -m 1 NOT_FOUND "$work/error") || cat "$work/error" >&2
  echo "$(date '+%F %T') @name: $state"
  case $state in
    NOT_FOUND)
      # A mistake ends it at once; later the quota may have to come back.
      qr create @nodes --accelerator-type=@accelerator \
          --runtime-version=@software@spot || [ "$created" ] || exit
      created=yes
      ;;
    SUSPENDED | FAILED) qr delete --force --quiet ;;
    ACTIVE)
      code=$(qr scp "$work/imagen_jax.tgz" @name: --node=all --worker=all >&2 &&
        qr ssh --node=all --worker=all --command="$job" |
        tee /dev/stderr | sed -n 's/^ended //p' | sort -n | tail -n 1)
      case $code in
        '' | 143) ;; # the connection broke, or the slice is being preempted
        *)
          qr delete --force --quiet
          exit "$code"
          ;;
      esac
      ;;
  esac
  sleep 60
done
