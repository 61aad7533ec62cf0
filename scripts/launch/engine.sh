# Sourced by the launchers: the environment by which accelerate knows the engine, as its own launcher would set it.
# ENGINE is ddp, fsdp2 or deepspeed (ZeRO-3).
case "${ENGINE:=ddp}" in
  ddp) ;;
  fsdp2)
    export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 FSDP_AUTO_WRAP_POLICY=TRANSFORMER_BASED_WRAP
    export FSDP_RESHARD_AFTER_FORWARD=true FSDP_STATE_DICT_TYPE=SHARDED_STATE_DICT
    export FSDP_CPU_RAM_EFFICIENT_LOADING=false  # every process tries its model out before training
    ;;
  deepspeed)
    export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=3 ACCELERATE_DEEPSPEED_ZERO3_INIT=false
    export ACCELERATE_USE_CPU=false  # told to use the CPU, accelerate leaves DeepSpeed out
    ;;
  *) echo "ENGINE=$ENGINE: choose ddp, fsdp2 or deepspeed" >&2; exit 2 ;;
esac
