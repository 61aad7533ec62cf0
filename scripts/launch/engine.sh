# Sourced by the launchers: the environment by which accelerate knows the engine, as its own launcher would set it.
# ENGINE is ddp or fsdp2.
case "${ENGINE:=ddp}" in
  ddp) ;;
  fsdp2)
    export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
    export FSDP_RESHARD_AFTER_FORWARD=true FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT
    ;;
  *) echo "ENGINE=$ENGINE: choose ddp or fsdp2" >&2; exit 2 ;;
esac
