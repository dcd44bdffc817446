/* AMX tile instructions on a CPU without them: a handler of SIGILL decodes the instruction, does what the manual says
 * (Intel Architecture Instruction Set Extensions, chapter 3) and goes on behind it. Each thread has its own tiles.
 * Anything that hardware would refuse ends the process with a line: products of tiles that do not fit or are not set up,
 * a configuration with reserved bytes, instructions that are not known here.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} config_t;

static __thread config_t config;
static __thread uint8_t tiles[8][16][64];
static long executed; /* of tile instructions, for a test that the emulator was used */

long tile_instructions(void) { return executed; }

static void refuse(const char* why, const uint8_t* at) {
  char line[160];
  int n = snprintf(line, sizeof line, "amx_emulator: %s at %p: %02x %02x %02x %02x %02x %02x\n", why, (const void*)at,
                   at[0], at[1], at[2], at[3], at[4], at[5]);
  if (write(2, line, (size_t)n) < 0) _exit(98);
  _exit(99);
}

static const int REGISTER[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

/* The memory operand behind ModRM: its address without the index, the index times its scale; returns its length. */
static int operand(const uint8_t* modrm, int b, int x, const greg_t* regs, uintptr_t* address, int64_t* index) {
  const int mod = modrm[0] >> 6, rm = modrm[0] & 7;
  const uint8_t* p = modrm + 1;
  int32_t far;
  *index = 0;
  if (rm == 4) {
    const int scale = *p >> 6, i = (*p >> 3 & 7) | x << 3, base = (*p & 7) | b << 3;
    const int none = (*p & 7) == 5 && mod == 0;
    p++;
    *address = none ? 0 : (uintptr_t)regs[REGISTER[base]];
    if (i != 4) *index = (int64_t)regs[REGISTER[i]] << scale;
    if (none) {
      memcpy(&far, p, 4);
      *address += (intptr_t)far;
      return (int)(p + 4 - modrm);
    }
  } else if (mod == 0 && rm == 5) { /* relative to the next instruction */
    memcpy(&far, p, 4);
    *address = (uintptr_t)(p + 4) + (intptr_t)far;
    return 5;
  } else {
    *address = (uintptr_t)regs[REGISTER[rm | b << 3]];
  }
  if (mod == 1) *address += (intptr_t)(int8_t)*p++;
  if (mod == 2) {
    memcpy(&far, p, 4);
    *address += (intptr_t)far;
    p += 4;
  }
  return (int)(p - modrm);
}

static float widened(uint16_t half) { /* bfloat16; denormals are zeros, as in the instruction */
  const uint32_t bits = (half & 0x7f80) ? (uint32_t)half << 16 : (uint32_t)(half & 0x8000) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static void multiply(int to, int a, int b, const uint8_t* at) {
  const int rows = config.rows[to], columns = config.row_bytes[to] / 4, pairs = config.row_bytes[a] / 4;
  if (to == a || to == b || a == b) refuse("tdpbf16ps needs three tiles", at);
  if (config.rows[a] != rows || config.row_bytes[b] / 4 != columns || config.rows[b] != pairs)
    refuse("tiles do not fit", at);
  for (int m = 0; m < rows; m++) {
    float* c = (float*)tiles[to][m];
    const uint16_t* x = (const uint16_t*)tiles[a][m];
    float even[16] = {0}, odd[16] = {0};
    for (int k = 0; k < pairs; k++) {
      const uint16_t* y = (const uint16_t*)tiles[b][k];
      for (int n = 0; n < columns; n++) {
        even[n] = __builtin_fmaf(widened(x[2 * k]), widened(y[2 * n]), even[n]);
        odd[n] = __builtin_fmaf(widened(x[2 * k + 1]), widened(y[2 * n + 1]), odd[n]);
      }
    }
    for (int n = 0; n < columns; n++) c[n] += even[n] + odd[n];
  }
}

static void on_illegal(int signal, siginfo_t* info, void* context) {
  (void)signal, (void)info;
  greg_t* regs = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* at = (const uint8_t*)regs[REG_RIP];
  if (at[0] != 0xc4 || (at[1] & 31) != 2) refuse("not a tile instruction", at);
  const int x = !(at[1] & 0x40), b = !(at[1] & 0x20), pp = at[2] & 3, source = ~(at[2] >> 3) & 15;
  const uint8_t opcode = at[3], *modrm = at + 4;
  const int reg = *modrm >> 3 & 7, mod = *modrm >> 6;
  uintptr_t address = 0;
  int64_t stride = 0;
  int length = 5;
  enum { NONE, P66, PF3, PF2 };
  if (mod != 3) length = 4 + operand(modrm, b, x, regs, &address, &stride);
  __atomic_fetch_add(&executed, 1, __ATOMIC_RELAXED);

  if (opcode == 0x49 && pp == NONE && mod != 3) { /* ldtilecfg */
    memcpy(&config, (const void*)address, 64);
    if (config.palette != 1 || config.start_row) refuse("not a configuration", at);
    for (int i = 0; i < 14; i++)
      if (config.reserved[i]) refuse("reserved bytes of the configuration", at);
    for (int t = 0; t < 16; t++)
      if (config.rows[t] > 16 || config.row_bytes[t] > 64 || (t > 7 && (config.rows[t] || config.row_bytes[t])))
        refuse("shape of a tile", at);
    memset(tiles, 0, sizeof tiles);
  } else if (opcode == 0x49 && pp == NONE) { /* tilerelease */
    memset(&config, 0, sizeof config);
  } else if (config.palette != 1) {
    refuse("tiles are not set up in this thread", at);
  } else if (opcode == 0x49 && pp == PF2 && mod == 3) {
    memset(tiles[reg], 0, sizeof tiles[reg]);
  } else if (opcode == 0x4b && (pp == PF2 || pp == P66)) { /* tileloadd, tileloaddt1 */
    memset(tiles[reg], 0, sizeof tiles[reg]);
    for (int r = 0; r < config.rows[reg]; r++)
      memcpy(tiles[reg][r], (const void*)(address + r * stride), config.row_bytes[reg]);
  } else if (opcode == 0x4b && pp == PF3) { /* tilestored */
    for (int r = 0; r < config.rows[reg]; r++)
      memcpy((void*)(address + r * stride), tiles[reg][r], config.row_bytes[reg]);
  } else if (opcode == 0x5c && pp == PF3 && mod == 3) {
    multiply(reg, *modrm & 7, source, at);
  } else {
    refuse("not a tile instruction that is known", at);
  }
  regs[REG_RIP] += length;
}

int install(void) {
  struct sigaction action = {0};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, NULL);
}
