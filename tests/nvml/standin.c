/* A stand-in for NVIDIA's libnvidia-ml.so.1: the C functions that memplan reaches through pynvml, answering from
 * the file that $NVML_STANDIN names. Signatures and structs as in nvml.h. With -DOLD it is a driver of 2020.
 *
 * Lines of the file, fields separated by tabs; a card or a slice is meant by its number in the file, from 0:
 *   driver VERSION CUDA                     e.g. 580.159.04, 13000
 *   card NAME UUID BUS TOTAL RESERVED USED MAJOR MINOR ECC VIRTUALIZATION MIG
 *   slice CARD NAME UUID TOTAL USED GPU_INSTANCE COMPUTE_INSTANCE MULTIPROCESSORS
 *   process UNIT PID BYTES                  BYTES -1: not available
 *   link CARD CARD NVLINKS LEVEL THROUGH_SWITCH
 *   fail FUNCTION CODE UNIT                 the function returns CODE for that unit; UNIT -1: always
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
typedef struct {
    char name[96], uuid[96], bus[32];
    u64 total, reserved, used;
    int major, minor, ecc, virtualization, mig, parent, gi, ci, sms, index;
} Unit;
typedef struct { unsigned version; u64 total, reserved, free, used; } Memory;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } Pci;

enum { OK = 0, INVALID = 2, NOT_FOUND = 6, TOO_SMALL = 7 };
static Unit units[32];
static int unit_count, card_count;
static struct { int unit; unsigned pid; long long bytes; } processes[64];
static int process_count;
static struct { int a, b, nvlinks, level, through_switch; } links[64];
static int link_count;
static struct { char function[80]; int code, unit; } fails[64];
static int fail_count;
static char driver[80] = "580.159.04";
static int cuda = 13000;

static int failure(const char *function, const Unit *unit) {
    for (int i = 0; i < fail_count; i++)
        if (!strcmp(fails[i].function, function) && (fails[i].unit < 0 || (unit && fails[i].unit == unit->index)))
            return fails[i].code;
    return OK;
}
#define CHECK(unit) do { int code_ = failure(__func__, unit); if (code_) return code_; } while (0)
#define TEXT "%95[^\t\n]"

static void read_line(const char *line) {
    Unit u = {.parent = -1, .index = unit_count};
    int p = process_count, l = link_count, f = fail_count;
    if (sscanf(line, "card\t" TEXT "\t" TEXT "\t%31[^\t]\t%llu\t%llu\t%llu\t%d\t%d\t%d\t%d\t%d", u.name, u.uuid, u.bus,
               &u.total, &u.reserved, &u.used, &u.major, &u.minor, &u.ecc, &u.virtualization, &u.mig) == 11) {
        units[unit_count++] = u;
        card_count++;
    } else if (sscanf(line, "slice\t%d\t" TEXT "\t" TEXT "\t%llu\t%llu\t%d\t%d\t%d", &u.parent, u.name, u.uuid,
                      &u.total, &u.used, &u.gi, &u.ci, &u.sms) == 8)
        units[unit_count++] = u;
    else if (sscanf(line, "process\t%d\t%u\t%lld", &processes[p].unit, &processes[p].pid, &processes[p].bytes) == 3)
        process_count++;
    else if (sscanf(line, "link\t%d\t%d\t%d\t%d\t%d", &links[l].a, &links[l].b, &links[l].nvlinks, &links[l].level,
                    &links[l].through_switch) == 5)
        link_count++;
    else if (sscanf(line, "fail\t%79[^\t]\t%d\t%d", fails[f].function, &fails[f].code, &fails[f].unit) == 3)
        fail_count++;
    else if (sscanf(line, "driver\t%79[^\t]\t%d", driver, &cuda) != 2)
        abort(); /* a slip in the test */
}

int nvmlInitWithFlags(unsigned flags) {
    char line[512];
    FILE *file = fopen(getenv("NVML_STANDIN"), "r");
    unit_count = card_count = process_count = link_count = fail_count = 0;
    while (file && fgets(line, sizeof line, file)) read_line(line);
    if (file) fclose(file);
    CHECK(NULL);
    return flags ? INVALID : OK;
}
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == 999 ? "Unknown Error" : "an error of the stand-in"; }

int nvmlSystemGetDriverVersion(char *text, unsigned size) { CHECK(NULL); snprintf(text, size, "%s", driver); return OK; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { CHECK(NULL); *version = cuda; return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { CHECK(NULL); *count = card_count; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Unit **unit) {
    for (int i = 0, cards = 0; i < unit_count; i++)
        if (units[i].parent < 0 && cards++ == (int)index) {
            CHECK(&units[i]);
            *unit = &units[i];
            return OK;
        }
    return INVALID;
}
int nvmlDeviceGetName(Unit *u, char *text, unsigned size) { CHECK(u); snprintf(text, size, "%s", u->name); return OK; }
int nvmlDeviceGetUUID(Unit *u, char *text, unsigned size) { CHECK(u); snprintf(text, size, "%s", u->uuid); return OK; }
int nvmlDeviceGetPciInfo_v3(Unit *u, Pci *pci) {
    CHECK(u);
    memset(pci, 0, sizeof *pci);
    snprintf(pci->bus_id, sizeof pci->bus_id, "%s", u->bus);
    return OK;
}
int nvmlDeviceGetMemoryInfo(Unit *u, u64 *memory) { /* total, free, used: the driver's share counts as used */
    CHECK(u);
    memory[0] = u->total;
    memory[1] = u->total - u->reserved - u->used;
    memory[2] = u->reserved + u->used;
    return OK;
}
int nvmlDeviceGetCudaComputeCapability(Unit *u, int *major, int *minor) {
    CHECK(u);
    *major = u->major;
    *minor = u->minor;
    return OK;
}
int nvmlDeviceGetEccMode(Unit *u, int *now, int *pending) {
    CHECK(u);
    if (u->ecc < 0) return 3;
    *now = *pending = u->ecc;
    return OK;
}
int nvmlDeviceGetVirtualizationMode(Unit *u, u64 *mode) { CHECK(u); *mode = u->virtualization; return OK; }

static int list_processes(Unit *u, unsigned *count, void *out) {
    unsigned room = *count;
    *count = 0;
    for (int i = 0; i < process_count; i++) {
        if (processes[i].unit != u->index) continue;
        if (out && *count < room) {
            struct { unsigned pid; u64 bytes; unsigned gi, ci; } entry = {processes[i].pid, processes[i].bytes, -1, -1};
            memcpy((char *)out + *count * sizeof entry, &entry, sizeof entry);
        }
        ++*count;
    }
    return *count > room || (!out && *count) ? TOO_SMALL : OK;
}
int nvmlDeviceGetComputeRunningProcesses_v2(Unit *u, unsigned *count, void *out) {
    CHECK(u);
    return list_processes(u, count, out);
}

#ifndef OLD
int nvmlDeviceGetComputeRunningProcesses_v3(Unit *u, unsigned *count, void *out) {
    CHECK(u);
    return list_processes(u, count, out);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(Unit *u, unsigned *count, void *out) {
    CHECK(u);
    *count = 0;
    return OK;
}
int nvmlDeviceGetMemoryInfo_v2(Unit *u, Memory *memory) {
    CHECK(u);
    if (memory->version != (sizeof *memory | 2 << 24)) return 25;
    memory->total = u->total;
    memory->reserved = u->reserved;
    memory->used = u->used;
    memory->free = u->total - u->reserved - u->used;
    return OK;
}
int nvmlDeviceGetMigMode(Unit *u, unsigned *now, unsigned *pending) {
    CHECK(u);
    if (u->mig < 0) return 3;
    *now = *pending = u->mig;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(Unit *u, unsigned *count) { CHECK(u); *count = 7; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(Unit *u, unsigned index, Unit **unit) {
    CHECK(u);
    for (int i = 0, found = 0; i < unit_count; i++)
        if (units[i].parent == u->index && found++ == (int)index) {
            *unit = &units[i];
            return OK;
        }
    return NOT_FOUND;
}
int nvmlDeviceGetGpuInstanceId(Unit *u, unsigned *id) { CHECK(u); *id = u->gi; return OK; }
int nvmlDeviceGetComputeInstanceId(Unit *u, unsigned *id) { CHECK(u); *id = u->ci; return OK; }
int nvmlDeviceGetAttributes_v2(Unit *u, unsigned *attributes) {
    CHECK(u);
    memset(attributes, 0, 40);
    attributes[0] = u->sms;
    return OK;
}
int nvmlDeviceGetTopologyCommonAncestor(Unit *a, Unit *b, int *level) {
    CHECK(a);
    for (int i = 0; i < link_count; i++)
        if (links[i].a == a->index && links[i].b == b->index) {
            *level = links[i].level;
            return OK;
        }
    return 3;
}
int nvmlDeviceGetP2PStatus(Unit *a, Unit *b, int what, int *status) {
    CHECK(a);
    *status = 4;
    for (int i = 0; i < link_count; i++)
        if (links[i].a == a->index && links[i].b == b->index && links[i].nvlinks && what == 2) *status = 0;
    return OK;
}
/* The NVLinks of a card are those of its lines, one line after the other. */
static int nvlink(Unit *u, unsigned index, int *through_switch, Unit **other) {
    int first = 0;
    for (int i = 0; i < link_count; i++) {
        if (links[i].a != u->index && links[i].b != u->index) continue;
        *through_switch = links[i].through_switch;
        *other = &units[links[i].a == u->index ? links[i].b : links[i].a];
        if ((int)index < (first += links[i].nvlinks)) return 1;
    }
    return 0;
}
int nvmlDeviceGetNvLinkState(Unit *u, unsigned link, unsigned *is_active) {
    int through_switch;
    Unit *other;
    CHECK(u);
    if (link >= 18) return INVALID;
    *is_active = nvlink(u, link, &through_switch, &other);
    return OK;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(Unit *u, unsigned link, int *type) {
    int through_switch = 0;
    Unit *other;
    CHECK(u);
    nvlink(u, link, &through_switch, &other);
    *type = through_switch ? 2 : 0;
    return OK;
}
int nvmlDeviceGetNvLinkRemotePciInfo_v2(Unit *u, unsigned link, Pci *pci) {
    int through_switch;
    Unit *other = u;
    CHECK(u);
    nvlink(u, link, &through_switch, &other);
    return nvmlDeviceGetPciInfo_v3(other, pci);
}
#endif
