from dsmoe.compilers.gpu_resources import h100_resources

PTXAS = """\
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the wgmma pipeline in the function \
'rows_mosaic_gpu_kernel'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'rows_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for rows_mosaic_gpu_kernel
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = 159.191 ms
"""
# As printed, but for the kernel's binary and the TMA descriptors.
HOST = """\
define void @rows_mosaic_gpu_init(ptr %0, ptr %1) {
  %4 = call ptr @mosaic_gpu_get_function(ptr %3, ptr @rows_mosaic_gpu_kernel_name, i32 1, i32 1)
}
define void @rows_mosaic_gpu(ptr %0, ptr %1, ptr %2) {
  call void @mosaic_gpu_init_tma_desc(ptr %18, ptr %21, i64 7, i64 3, ptr %22, ptr %25, i64 16)
  call void @mosaic_gpu_launch_kernel(ptr %0, i32 181, i32 8, i32 3, i32 0, i32 0, i32 0, \
i32 384, i32 1, i32 1, i32 230480, ptr %1, ptr %33)
}
"""
SECOND = (
  PTXAS.split("\n", 1)[1].replace("168 registers", "8 registers"),
  HOST.replace("230480", "14344").replace("i32 384", "i32 128").replace("i32 181", "i32 182"),
)


def test_reads_registers_spills_and_launch():
  assert h100_resources(PTXAS + HOST) == {
    "rows": {
      "registers": 168,
      "stack_bytes": 16,
      "spill_store_bytes": 12,
      "spill_load_bytes": 20,
      "serialized_wgmma": 1,
      "blocks": 181 * 8 * 3,
      "threads": 384,
      "shared_bytes": 230481,
      "blocks_per_sm": 1,
    }
  }


def test_kernels_of_one_name_and_no_launch():
  found = h100_resources("noise\n" + PTXAS.split("\n", 1)[1] + HOST + "noise" + "\n".join(SECOND))
  assert list(found) == ["rows", "rows 2"]
  assert found["rows"]["blocks"] == 181 * 8 * 3 and found["rows 2"]["blocks"] == 182 * 8 * 3
  assert found["rows"]["serialized_wgmma"] == 0
  # 233472 // (14345 + 1024) = 15, before 2048 // 128 = 16 and 65536 // (256 * 4) = 64.
  assert (found["rows 2"]["registers"], found["rows 2"]["blocks_per_sm"]) == (8, 15)
  assert "blocks" not in h100_resources(PTXAS)["rows"]
  assert h100_resources("nothing") == {}
